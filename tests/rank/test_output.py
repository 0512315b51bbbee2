"""What a rank prints."""

import io
import logging
import re

from clipcluster.rank.output import log_to


def test_one_line_a_message():
    first, second = io.StringIO(), io.StringIO()
    log_to(first, 0)
    logger = log_to(second, 3)
    logger.info("step %d", 7)
    logging.getLogger("clipcluster").warning("slow")
    assert first.getvalue() == ""
    lines = second.getvalue().splitlines()
    assert [re.sub(r"^\S+ \S+ ", "", line) for line in lines] == ["rank 3 step 7", "rank 3 slow"]
