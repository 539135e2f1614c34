"""One script a claim, installed as `fastkd.benchmarks`; `fastkd bench` runs them.

Each claim is measured beside whatever it has to beat, interleaved in one run; its figures go to a JSON file with the environment they
were measured in, and tables and plots are drawn from those files alone (`report.py`). Nothing here imports torch before a claim runs.
"""

CLAIMS = {
    "linear_kl": "`linear_kl_div` is exact and costs little above the four matrix products that no exact method can avoid.",
    "masked": "Masked tokens cost nothing.",
    "scaling": "The cost of a token and the peak of memory do not depend on the number of tokens.",
    "row_kernel": "The row kernels run at the speed of memory.",
    "accuracy": "Gradients stay exact when the student is close to its teacher, because logits are never rounded to 16 bits.",
    "relation_kl": "`relation_kl` is exact to 2e-5 in float32, takes at most a tenth of eager torch's memory, and no more time.",
    "projected_mse": "`projected_mse` is exact to 2e-5 in float32, takes at most a quarter of eager torch's memory, and no more time.",
    "grad_filter": "With `grad_filter`, backward products on a part of the vocabulary beat the dense floor on a really trained pair.",
}
"""What is claimed, by the name of the module that measures it: the order of `fastkd bench` and of the report."""
