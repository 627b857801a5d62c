"""The backbone of an MoE, chosen by measurement or merged with statistics of text."""
