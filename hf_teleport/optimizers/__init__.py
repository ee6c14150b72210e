"""What an optimizer keeps for each weight: turned, reset, and rehearsed on copies."""
