"""Files that hold a trained model for programs without this package: one module for each format.

A format is a module with

    IS_FOLDER               whether it is a folder of files, or one file
    check(plain)            raises ValueError where it cannot hold such a model, or a package is missing
    write(plain, path)      makes the file or folder at a path where there is none
    read(path)              opens it as a stranger would: a function from images `[B, 3, H, W]` to logits, on the CPU
    is_export(path)         whether what is at a path was made by `write`
"""

FORMATS = {"timm": "timm_folder", "torch-export": "torch_export", "onnx": "onnx_file"}  # the modules, by name
