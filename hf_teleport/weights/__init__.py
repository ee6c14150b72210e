"""Weights as an event finds and leaves them: whole or sharded, on one rank or several, copied, put back."""
