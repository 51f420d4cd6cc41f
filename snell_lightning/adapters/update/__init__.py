"""What an update is: kernel and competition as one rule, the factors that are trained, the engines that compute it."""
