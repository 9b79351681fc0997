"""What a server is put under load with: adapters drawn by number, requests by Zipf's law, a report. Loopback only."""

from typing import Final

KEY: Final = "TARSIA_API_KEY"
"""The environment's variable that an API key is read from: what is typed is seen by others."""
