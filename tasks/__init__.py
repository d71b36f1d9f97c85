"""What is to be learnt: labelled texts, their splits, their metrics. Imports nothing of ours."""
