"""What every package may use: errors, the project's folder, text for a terminal, progress, memory."""
