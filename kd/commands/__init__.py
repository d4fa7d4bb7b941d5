"""The commands `hover-batch kd …`, one file each. Heavy imports stand inside them, so that `--help` answers at once."""
