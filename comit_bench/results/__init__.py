"""Result records and the tables made from them."""
