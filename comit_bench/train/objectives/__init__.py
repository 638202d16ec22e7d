"""What is learned: COMiT, small autoencoders, teachers."""
