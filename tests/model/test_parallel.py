"""Several processes hold the model together, and compute what Meta's reference computes."""
from parallel_checks import golden
from ranks_run import all_well, run_ranks


def test_two_and_four_ranks_compute_what_metas_reference_computes():
    all_well(run_ranks(golden, ["image_first", "two_images"], "image_first"))
    all_well(run_ranks(golden, ["ratio_1x1"], count=4))
