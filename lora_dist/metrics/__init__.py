"""Classification metrics, shared by training, prediction and audit."""
