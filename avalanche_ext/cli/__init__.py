"""The command ``avalanche-ext``: one thin file per subcommand."""
