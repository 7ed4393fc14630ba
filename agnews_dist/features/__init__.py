"""The output of the frozen part kept between epochs and runs: where its rows lie, who computes them, where they are kept."""
