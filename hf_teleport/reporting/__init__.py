"""A finished run, read from the files it left, as pictures and tables of the HTML report."""
