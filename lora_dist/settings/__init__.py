"""The settings of every command, from flags, YAML files and packaged recipes. Never imports torch."""
