"""What the values of a tensor are, in one pass over them: moments, unit norms, samples and equal rows."""
