"""Files, devices, the terminal and child processes: the ground floor, which every package may use."""
