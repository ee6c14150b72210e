"""The subcommands of `hf-teleport`."""
