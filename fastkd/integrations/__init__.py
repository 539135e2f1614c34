"""Other people's training loops over fastkd's objectives; each is imported when it is asked for."""
