"""Read what a user names on a command line (files of rows, saved models), or refuse it in one line that says what to do."""
