"""Runs the command line as `python -m onnx_woq.cli`."""

from onnx_woq.cli.commands import main

if __name__ == "__main__":
    main()
