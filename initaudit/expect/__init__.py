"""What the values of a weight ought to be: exact gains, the laws of Xavier, He and LeCun, the catalogue of schemes."""
