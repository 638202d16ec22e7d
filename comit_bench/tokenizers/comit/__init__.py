"""COMiT."""
