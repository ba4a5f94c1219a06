"""What processes tell each other, and how layers are put together from shares."""
from ranks_checks import small_things
from ranks_run import all_well, run_ranks
from small_checkpoint import HEAD, single, small_tensors


def test_what_ranks_tell_each_other_and_layers_made_of_shares(tmp_path):
    tied = small_tensors()
    del tied[HEAD]
    all_well(run_ranks(small_things, single(tmp_path, tied, tie_word_embeddings=True)))
