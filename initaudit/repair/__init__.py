"""`initaudit fix`: draws the weights that findings name again, by the lines that the findings propose, into a new file."""

from initaudit.repair.rounds import Repair, repair

__all__ = ["Repair", "repair"]
