"""What another tool made of an MoE, compared with it: are the experts still its own?"""
