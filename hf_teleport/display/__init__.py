"""How numbers and events are written for people: the same in the terminal, in a model card and in an HTML page."""
