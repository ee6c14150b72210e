"""A finished run, read from its files, as pictures and tables of the HTML report."""
