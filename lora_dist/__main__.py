"""Lists the commands: `python -m lora_dist`."""

COMMANDS = {
    "audit": "check a folder of images before training",
    "train": "fine-tune an image classifier; also with accelerate launch",
    "predict": "classify images; merge, export or serve a model",
    "compare": "compare two models on the same images",
    "folds": "gather the runs of a cross-validation",
    "sweep": "search for hyperparameters",
    "bench": "measure the speed of a training run",
    "gpu_check": "check this machine and its GPUs",
    "launch_files": "list or copy the launch files for accelerate",
}
"""The commands of the package, each with its purpose."""

if __name__ == "__main__":
    for name, what in COMMANDS.items():
        print(f"python -m lora_dist.{name:14}{what}")
    print("Each takes --help.")
