"""What a study tries next, when it is over, and one trial from claim to tell."""
