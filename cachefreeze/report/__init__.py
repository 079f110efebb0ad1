"""What a run tells: its files, its lines on the terminal, its page, and runs side by side."""
