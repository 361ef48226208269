"""A trained adapter as files for other programs: merged, ONNX, older PEFT releases."""
