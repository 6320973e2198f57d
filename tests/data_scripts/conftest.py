"""One small data set from the built-in sources, made once for all tests of this folder."""

import pytest

from data_scripts.prepare_pretraining import prepare


@pytest.fixture(scope="session")
def built_in(tmp_path_factory):
    """(folder, manifest) of the default mixture, 200,000 tokens."""
    folder = tmp_path_factory.mktemp("data") / "built_in"
    manifest = prepare(folder, max_tokens=200_000, vocab_size=1_024, validation_fraction=0.1,
                       tokens_per_file=90_000, progress=False)
    return folder, manifest
