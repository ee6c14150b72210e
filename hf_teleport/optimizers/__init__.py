"""An optimizer's state in an event: turned with the weights, reset, or rehearsed on copies."""
