"""Files of rows and saved models that a user names on a command line: read, or refused in one line with the way out."""
