"""A world of coloured shapes, small enough that image and video generators of real architectures train in it on a CPU."""
