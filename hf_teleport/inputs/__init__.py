"""What a user names on a command line, files of rows and saved models: read, or refused in one line that says what to do."""
