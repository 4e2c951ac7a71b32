"""What each subcommand of `pins-ext` does; `pins_ext.cli.main` finds it."""
