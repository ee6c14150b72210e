"""What a user may set: the settings in groups, by the methods that read them, and how their values are read and checked."""
