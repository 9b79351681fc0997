"""What every chapter of the lab shares: its description, the desk it works at, its result, its page."""
