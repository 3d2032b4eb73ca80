"""What a checkpoint costs to run: time, bytes and memory, beside what they cannot fall below."""
