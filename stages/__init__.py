"""The pipeline's stages, one thin script each: read params, call the library, write the outs dvc.yaml names."""
