"""What a server is put under load with: adapters drawn by number, requests by Zipf's law, a report. Loopback only."""
