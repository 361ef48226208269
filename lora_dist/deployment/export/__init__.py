"""Exports a trained adapter: merged, as ONNX, and for older releases of PEFT."""
