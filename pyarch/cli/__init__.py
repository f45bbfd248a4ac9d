"""The subcommands of `python -m pyarch`: each module has add_arguments(parser) and main(args) -> exit status."""
