"""Files that travel in the package: the embedded data set and backbone, and the script that made the latter."""
