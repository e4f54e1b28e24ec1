"""The tasks of GLUE, each with the number that its models are compared by. As `data`,
their names go before folders of that name."""

GLUE = {
    "cola": "matthews",
    "mnli": "accuracy",
    "mrpc": "f1",
    "qnli": "accuracy",
    "qqp": "f1",
    "rte": "accuracy",
    "sst2": "accuracy",
    "stsb": "pearson",
    "wnli": "accuracy",
}
DEMONSTRATION = ("movie_reviews", "product_reviews")  # the data that comes with kdfast
