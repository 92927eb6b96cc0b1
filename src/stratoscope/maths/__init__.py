"""Pure tensor functions that three or more methods share."""
