"""The probe network, its fit, and the processes that fit several seeds at once."""
