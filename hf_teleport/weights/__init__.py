"""Access to a model's weights in an event: whole or sharded, on one rank or several; copies to restore, and isolation."""
