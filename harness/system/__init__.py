"""Files, devices, the terminal and child processes: what every package stands on."""
